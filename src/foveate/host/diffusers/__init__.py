"""Methods on diffusion models of the package diffusers, which is never imported here."""
