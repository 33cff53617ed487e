"""The command line. It lies beside the library, since importing anything of `falqon_fx` imports
torch, and help needs none of it.
"""
