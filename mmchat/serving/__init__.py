"""What people and programs talk to: the page, the model server's client, a Space."""
