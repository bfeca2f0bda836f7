"""The tutor: a small GPT-2 that this repository trains from its own dialogues.

dialogues/      what it may learn: reviewed text in Spanish and English
corpus.py       dialogues -> endless conversations -> token rows
__main__.py     `make tutor`: tokenizer, training, model card
"""
