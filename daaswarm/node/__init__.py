"""The composition root: builds one node out of all other parts and runs it.

``coordinator`` what a node is: read it first; ``life`` how it starts, runs and stops; ``hosting`` what it serves;
``answering`` what it asks for.
"""
