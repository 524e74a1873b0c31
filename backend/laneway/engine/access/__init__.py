"""Who calls, and what they may: keys, tokens, JWTs, tenants, their own rate limits, and the audit log."""
