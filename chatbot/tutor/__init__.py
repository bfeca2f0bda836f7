"""The tutor: a small GPT-2 that this repository trains from its own dialogues.

dialogues/      what it may learn: reviewed text in Spanish and English
corpus.py       dialogues -> endless conversations
wording.py      a wording as somebody else would have typed it; names that nobody has
pieces.py       text -> tokens, some words cut into other pieces than usual
rows.py         conversations -> rows of tokens, step by step
embeddings.py   token embeddings that tell, as a bag of words, what a line is about
start.py        these, and heads that copy, written into the weights before the first step
__main__.py     `make tutor`: tokenizer, weights, loss curve
"""
