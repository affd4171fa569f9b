"""What makes an optimizer distributed: one module for each library that reduces gradients."""
