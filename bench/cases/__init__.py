"""What is measured: parameter shapes of real models, recipes, update rules, functions, and their tensors."""
