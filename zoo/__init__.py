"""The models, their recipes and their checkpoints; installs as nystromgan.zoo."""
