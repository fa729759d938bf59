"""Agent attention: queries and keys meet in a few agents, pooled from the queries."""
