"""The ranks of a job and what they do together.

Files at this level (sizes, mesh, collectives, shards, dropout, calls that all ranks make) import none of the folders.
Folders do not import each other, except `zero`, which knows the experts of `ep`. All may import `ops`.
"""
