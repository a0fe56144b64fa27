"""The search for the cheapest setting that keeps a share of the full cache's score: `foveate tune`."""
