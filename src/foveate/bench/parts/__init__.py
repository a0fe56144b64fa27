"""Parts that every benchmark uses: digests, journals, plain data, intervals, clocks, memory."""
