"""What people use instead; a form takes the public function's tensors by name."""
