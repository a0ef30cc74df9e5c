"""Helpers of `train_demo.py`: a task, a policy, a learner, rollout workers, and the report."""
