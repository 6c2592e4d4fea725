"""Post-training, carried by TRL: preferences, rewards, reinforcement (extra `post`).

native               TRL's own trainers take lorica's configurations
"""
