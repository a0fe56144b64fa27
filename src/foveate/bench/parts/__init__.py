"""What every benchmark uses: fingerprints, journals, plain data, intervals, clocks, memory."""
