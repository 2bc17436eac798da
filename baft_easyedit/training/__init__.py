"""How an edit is learned: from requests to steps, and what keeps earlier edits."""
