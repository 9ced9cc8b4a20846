"""Speed and memory beside peers, in one run on one machine, as ratios with their spread."""
