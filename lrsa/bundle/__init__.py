"""What a node without a network needs, in one folder: wheels, model, data, and a script that installs from it.

`python -m lrsa.bundle --help`; on the node, `python install.py` inside the folder.
"""
