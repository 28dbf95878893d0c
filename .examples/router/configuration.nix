# The router of a small office: NixOS with channels. There is no flake.nix beside this file, so Bento builds it with
# the machine's own channel, and updates that first.
{ pkgs, ... }:

{
  imports = [
    ./hardware-configuration.nix
    ./utils/bento.nix
  ];

  networking.hostName = "router";

  services.bento = {
    server = [
      # In the office first, then from everywhere.
      "10.0.0.2"
      "bento.example.org"
    ];
    # A list needs them: else each server is trusted at its first contact. From the server's
    # /etc/ssh/ssh_host_ed25519_key.pub; this one is an example.
    serverKeys = [ "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIEJFTlRPIEVYQU1QTEUgS0VZIERPIE5PVCBVU0UhISEh" ];
    upgradeChannels = true;
    # Nobody is in the office at that time.
    reboot = "03:30-05:00";
    # What a router is for. A release that breaks it is taken back.
    healthChecks = [
      "${pkgs.iputils}/bin/ping -c 1 -W 5 9.9.9.9"
      "systemctl is-active dnsmasq.service"
    ];
  };

  networking = {
    useDHCP = false;
    interfaces.wan0.useDHCP = true;
    interfaces.lan0.ipv4.addresses = [
      {
        address = "10.0.0.1";
        prefixLength = 24;
      }
    ];
    nat = {
      enable = true;
      externalInterface = "wan0";
      internalInterfaces = [ "lan0" ];
    };
    firewall.interfaces.lan0 = {
      allowedTCPPorts = [ 53 ];
      allowedUDPPorts = [
        53
        67
      ];
    };
  };

  services.dnsmasq = {
    enable = true;
    settings = {
      interface = "lan0";
      dhcp-range = "10.0.0.100,10.0.0.200";
    };
  };

  system.stateVersion = "25.11";
}
