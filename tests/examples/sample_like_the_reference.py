"""A sampling snippet in the way of notebooks for the reference; run by tests/scripts/test_examples.py with weights and an output file."""

import sys

import cv2
import einops
import numpy as np
import torch
from pytorch_lightning import seed_everything

from cldm.ddim_hacked import DDIMSampler
from cldm.model import create_model, load_state_dict

weights, out = sys.argv[1:]

model = create_model("./models/cldm_tiny.yaml").cpu()
model.load_state_dict(load_state_dict(weights, location="cpu"))
ddim_sampler = DDIMSampler(model)

prompt, added_prompt, negative_prompt = "red circle with blue background", "best quality", "lowres"
num_samples, ddim_steps, guess_mode, strength, scale, seed, eta = 2, 5, True, 1.0, 9.0, 7, 0.0

with torch.no_grad():
    detected_map = np.zeros((64, 64, 3), dtype=np.uint8)
    cv2.circle(detected_map, (32, 32), 20, (255, 255, 255), 1)
    H, W, C = detected_map.shape

    control = torch.from_numpy(detected_map.copy()).float() / 255.0
    control = torch.stack([control for _ in range(num_samples)], dim=0)
    control = einops.rearrange(control, "b h w c -> b c h w").clone()
    seed_everything(seed)

    cond = {
        "c_concat": [control],
        "c_crossattn": [model.get_learned_conditioning([prompt + ", " + added_prompt] * num_samples)],
    }
    un_cond = {
        "c_concat": None if guess_mode else [control],
        "c_crossattn": [model.get_learned_conditioning([negative_prompt] * num_samples)],
    }
    shape = (4, H // 8, W // 8)
    model.control_scales = [strength * (0.825 ** float(12 - i)) for i in range(13)] if guess_mode else ([strength] * 13)
    samples, intermediates = ddim_sampler.sample(
        ddim_steps,
        num_samples,
        shape,
        cond,
        verbose=False,
        eta=eta,
        unconditional_guidance_scale=scale,
        unconditional_conditioning=un_cond,
    )
    x_samples = model.decode_first_stage(samples)
    x_samples = (
        (einops.rearrange(x_samples, "b c h w -> b h w c") * 127.5 + 127.5).cpu().numpy().clip(0, 255).astype(np.uint8)
    )

np.save(out, x_samples)
