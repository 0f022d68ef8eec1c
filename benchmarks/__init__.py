"""Side-by-side runs against peers: each prints a table; nothing timed lives in the tests."""
