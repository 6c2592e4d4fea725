"""The training itself: one Trainer, its loss, its optimizer, and the work around its steps.

fit                  from encoded rows to a trained model: read here first
trainer, loss        the step from top to bottom
mixin                what other trainers of a run have of it too: log, order of rows, checkpoints
deferred             logits that are not computed until somebody needs them
arguments            a recipe's training as transformers' arguments, its defaults chosen
optimizer, sampler   groups of parameters; the order of rows
callbacks, scoring   progress and Ctrl-C; scores of an evaluation
checkpoints          which can be trusted; adapters read back from one
"""
