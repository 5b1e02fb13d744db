"""The parts of `efficiency.py` and `plan.py`, one idea a file.

- `presets.py`: models, scans and prompts of each size;
- `counting.py`: operations of answers, encodings, further questions and training steps;
- `bounds.py`: what these say of a preset;
- `models.py`: one set of weights as stock Qwen2.5-VL and as Photon with either cut, and their inputs;
- `timing.py`: cases that take turns on the clock;
- `answers.py`, `steps.py`: what is timed of answering and of training;
- `holders.py`: who holds a step's memory at its peak;
- `growth.py`: by volume and by questions, and the plot;
- `planning.py`: memory and time without running anything.
"""
