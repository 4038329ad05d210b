"""Training: what a paper gives the loop (`contract`), and the loop, which knows no paper."""
