"""The families of operators, and their states."""
