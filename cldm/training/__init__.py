"""Training a ControlNet as a run that can be stopped, continued and trusted; `tutorial_train.py` puts the parts together.

A run:
settings.py, presets.py   what can be set, and sets of settings by the size of a GPU
folder.py                 the run's folder: settings, checkpoints, one process at a time
data.py, batches.py       the pairs, checked and held out; which of them each step uses
engine.py                 Lightning's Trainer, random numbers of each step, signals, progress
checkpoints.py            what is saved, when, and how a run goes on from it
health.py                 steps whose loss is not finite
optim.py, phases.py       optimizer and schedule; what is trained from which step on

Small and fast:
cache.py                  latents and text embeddings on disk
precision.py              frozen weights in half precision, recomputation
memory.py                 what a step takes, computed without a GPU

What a run tells:
instrument.py             what the instruments share
gain.py, dynamics.py      control gain; losses, norms, speed, memory
pictures.py, held_out.py  held-out hints: sampled, scored and shown
metrics.py, curves.py     metrics.csv and curves.png
"""
