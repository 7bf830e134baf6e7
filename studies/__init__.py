"""Studies with power: systems that are tuned alike, fresh seeds, paired intervals, Holm over the claims."""
