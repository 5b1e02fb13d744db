"""From a folder of a model to a repository on the Hub: only what belongs there, with a card made from the runs.

`folder.py` builds the folder of a model, `space.py` that of a Space, `card.py` writes the card; `scripts/push.py` is
the command.
"""
