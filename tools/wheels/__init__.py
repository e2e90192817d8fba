"""``make wheels``: what a release consists of, built from git's files alone, audited, and tried in an environment
without a compiler.
"""
