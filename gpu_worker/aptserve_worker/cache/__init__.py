"""The worker's memory: units, block tables and the tensors behind them."""
