"""A training script in the way of the reference's users, with the arguments of Lightning 2.

Run by tests/scripts/test_examples.py with a data folder and weights.
"""

import sys

import pytorch_lightning as pl
from torch.utils.data import DataLoader

from cldm.logger import ImageLogger
from cldm.model import create_model, load_state_dict
from tutorial_dataset import MyDataset

data, resume_path, out = sys.argv[1:]

batch_size = 4
logger_freq = 2
learning_rate = 1e-5
sd_locked = True
only_mid_control = False

model = create_model("./models/cldm_tiny.yaml").cpu()
model.load_state_dict(load_state_dict(resume_path, location="cpu"))
model.learning_rate = learning_rate
model.sd_locked = sd_locked
model.only_mid_control = only_mid_control

dataset = MyDataset(data)
dataloader = DataLoader(dataset, num_workers=0, batch_size=batch_size, shuffle=True)
logger = ImageLogger(batch_frequency=logger_freq, log_images_kwargs={"ddim_steps": 3})
trainer = pl.Trainer(
    accelerator="cpu", precision=32, callbacks=[logger], max_steps=3, default_root_dir=out, enable_progress_bar=False
)
trainer.fit(model, dataloader)
