{ pkgs, ... }:

{
  networking.networkmanager.enable = true;

  services.xserver.enable = true;
  services.displayManager.gdm.enable = true;
  services.desktopManager.gnome.enable = true;

  environment.systemPackages = [
    pkgs.firefox
    pkgs.libreoffice
  ];
}
