"""Tasks after instruction tuning: preferences, rewards, and reinforcement by groups of answers.

Their losses are TRL's (`lorica.train.post`); here rows become prompts and answers, and outputs become scores.
"""
