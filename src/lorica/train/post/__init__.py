"""Post-training, carried by TRL: preferences, rewards, reinforcement (extra `post`).

settings             a recipe's part ``post``
making               a task's trainer and its arguments
trainers             TRL's trainers as a run has them
rewards              what scores an answer: functions, reward adapters on the policy's own base
native               TRL's own trainers, in a script, take lorica's configurations

What the tasks read of rows is in `lorica.train.tasks`: preference, reward, grouped, answers.
"""
