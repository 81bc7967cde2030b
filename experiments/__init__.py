"""What a user runs: one file a verb, each a function that Python can call, such as ``from experiments.train import train``."""  # part of ehr: start.py looks for these words
