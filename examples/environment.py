"""Train plain stable-baselines3 on the pruning environment, then let it make a plan."""

from __future__ import annotations

import gymnasium
from stable_baselines3 import PPO

import autoprune

task = {
    "task": {"name": "digits", "widths": [8, 16]},
    "dense": {"epochs": 4, "learning_rate": 0.1},
    "env": {"min_saving": 0.0},  # every layer is offered, however small
}
env = gymnasium.make("autoprune/Prune-v0", task=task, target_sparsity=0.8, actions=["sparsity", "group_size"])
print(f"autoprune {autoprune.__version__}: a step chooses {env.get_wrapper_attr('action_names')}")

steps = env.get_wrapper_attr("steps_per_episode")  # one for the run, one a layer
agent = PPO("MlpPolicy", env, n_steps=4 * steps, batch_size=2 * steps, learning_rate=1e-3, device="cpu")
agent.learn(8 * steps)  # hundreds of episodes where it matters
agent.save("agent.zip")

observation, info = env.reset(seed=0)
over: bool = False
while not over:
    action, state = agent.predict(observation, deterministic=True)
    observation, reward, over, truncated, info = env.step(action)
trial = info["trial"]
print({name: layer["sparsity"] for name, layer in trial["plan"]["layers"].items()})
print(f"{trial['score']:.1%} accuracy before fine-tuning, {trial['speedup']:.2f}x speed-up over torch eager")
