"""What is inside disk images, through libguestfs' appliance."""
