{
  imports = [
    ./desktop.nix
    ./hardware-configuration.nix
    ./utils/bento.nix
  ];

  networking.hostName = "t470";

  services.bento = {
    server = "bento.example.org";
    # The server's /etc/ssh/ssh_host_ed25519_key.pub. Put the real one here, or remove this line: the machine then
    # trusts the first key that it is shown.
    serverKeys = [
      "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIEJFTlRPIEVYQU1QTEUgS0VZIE9GIFRIRSBTRVJWRVIh EXAMPLE-of-the-server-that-nobody-has"
    ];
    # Who uses the laptop may ask for an update, without being root: cat < /dev/tcp/127.0.0.1/51337
    trigger.enable = true;
  };

  users.users.alice = {
    isNormalUser = true;
    extraGroups = [ "networkmanager" ];
  };

  system.stateVersion = "25.11";
}
