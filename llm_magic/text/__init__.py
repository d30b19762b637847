"""Text on its way in and out: values into prompts, answers onto pages and terminals."""
