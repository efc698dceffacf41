"""Training a ControlNet as a run that can be stopped, continued and trusted; `tutorial_train.py` puts the parts together.

settings.py     what can be set, with presets and checks
batches.py      which pairs each step uses
engine.py       Lightning's Trainer, random numbers of each step, signals, progress
checkpoints.py  what is saved, when, and how a run goes on from it
health.py       steps whose loss is not finite
optim.py        optimizer, learning-rate schedule, weights of the loss
phases.py       what is trained from which step on
"""
