"""The diffusion process: schedule, training (`ddpm`) and sampling (`ddim`, `plms`, `dpm_solver`)."""
