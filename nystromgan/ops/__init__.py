"""One folder an op: the public function and its torch.library op, the definition, and the kernels of each backend."""
