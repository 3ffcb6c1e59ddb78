"""From noise to a latent: schedules, solvers, guidance, masks, the loop."""
