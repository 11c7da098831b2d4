"""Request bodies to token ids, exactly as the engine makes them, without torch.

In dependency order:

``bodies``         what a body asks for
``chat_template``  a chat to the text that is tokenized
``pieces``         text to ids, remembering pieces
``tokenize``       all of it, off the event loop, with the engine as the last resort
"""
