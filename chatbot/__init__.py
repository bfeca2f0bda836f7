"""A conversation with a language model: python -m chatbot.

    engines        the narrow protocol behind which a model stands, and how to open one
    settings       how replies are drawn: names, ranges, defaults
    reply          one reply, from token ids to text, as it comes
    conversation   what is said, and which part of it still fits the context
    storage        a conversation as a file: save, load, export
    commands       /help, /system, /set … in the terminal
    terminal       the conversation on a terminal
    wrap           text fit for a screen
    texts          every sentence that a person reads, in English and Spanish

Nothing in engines, settings, reply, conversation and storage knows of a terminal.
"""
