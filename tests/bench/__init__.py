"""How fast Laneway is, beside stock RQ in the same minute: `make bench`. docs/explanation/performance.md."""
