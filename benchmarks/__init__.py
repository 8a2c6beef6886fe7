"""Benchmarks of autoprune: ``python -m benchmarks NAME [options]`` from the top of a checkout; README.md lists them."""

from __future__ import annotations

from collections.abc import Mapping

# Name, which is also the module's -> what it answers.
BENCHMARKS: Mapping[str, str] = {
    "agent_vs_uniform": "what an agent's plan gains over the uniform rule, at the same measured speed-up",
    "agents": "which agent plans best at equal evaluations and equal measured speed-up",
    "ask": "whether a speed-up that is asked for is delivered, or refused with a figure that holds",
    "build": "how large natively built models are, and how fast their calls",
    "container": "whether all works without a home, in read-only places, without executable memory",
    "coverage": "which of other people's models become faster, how, and which do not",
    "dynamic": "whether channel gates beat static plans of the same accuracy",
    "encodings": "how small packed weights are in a file, and how fast they are read",
    "engine": "how much faster repacked standard models are than the best dense engine",
    "fetch": "whether the model of cache lines agrees with cachegrind",
    "fine_grained": "who finds the best recipe: agent, random search, TPE or a person",
    "front": "whether a large pruned model is better than a small dense one of the same latency",
    "fuzz": "whether damaged and hostile files end in an error in words",
    "generalist": "what each part of the generalist's design is worth",
    "kills": "whether killed commands go on without losing or doubling anything",
    "layers": "how near packed layers come to the processor's peak",
    "lenet": "how far LeNet-5 can be pruned at a loss of 0.1 point",
    "main_job": "whether README's main job delivers, and what its rules would have",
    "methods": "which training method loses least, at one budget of epochs and weights",
    "onnx_export": "whether exported ONNX files are faster than the same zeros exported dense",
    "permutation": "what choosing the filters of a group by similarity gives",
    "planning": "how long a plan for ResNet-50 takes",
    "post_training": "what pruning without labels and training keeps, by criterion and fit",
    "precision": "what int8 costs a pruned model in accuracy, and how much faster it makes it",
    "recurrent": "how much faster packed LSTMs and GRUs are than the best dense engine",
    "recurrent_training": "what pruning costs recurrent networks",
    "scale": "how many trials a minute workers make",
    "speedup_picture": "draws the README's picture from the rows of engine",
    "steering": "whether a policy that steers fine-tunings beats fixed schedules at equal steps",
    "threads": "whether threads that repack, save, load and call at once disturb each other",
}
