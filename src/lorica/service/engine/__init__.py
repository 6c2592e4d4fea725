"""The engine: one base, many adapters trained and sampled from.

datum      a sequence and the loss's inputs at each of its positions
losses     sums over tokens of a function of log-probabilities
targets    which layers an adapter may have updates for
weights    an adapter in the engine, in training or to sample from; AdamW
lanes      several sequences through one model, each with the bits that it has alone
abreast    which sequences can share a call of the model
proof      whether this model keeps them apart
base       the model, its head and its limits
training   one pass for the sequences of many calls
drawing    one pass for a token of each of many samples
desk       requests for samples, and whose turn it is
engine     whose turn it is: one thread
several/   several of them, in processes over one base
"""
