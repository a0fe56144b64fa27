"""Parts that several analyses of heads share."""
