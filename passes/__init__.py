"""The passes, one a file; `falqon_fx.passes.pipeline` runs them in their order."""
