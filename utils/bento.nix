# The host's side of Bento, a NixOS module: options `services.bento.*`, the client's settings in
# /etc/bento/client.json, the command `bento-client`, and the units that run it.
#
# For NixOS 24.05 and later, with channels or flakes. The client lies beside this file.
{
  config,
  lib,
  options,
  pkgs,
  ...
}:

let
  cfg = config.services.bento;

  inherit (lib) literalExpression mkOption types;

  # Built from the text, not copied by its path: the file may be a symlink, which Nix would copy as one.
  source = pkgs.writeText "bento_client.py" (builtins.readFile ./bento_client.py);

  # Compiled once here, instead of at each start: that is a third of what a poll takes. As it is where this machine's
  # Python does not run on the one that builds.
  client =
    if (pkgs.stdenv.buildPlatform.canExecute or (_: false)) pkgs.stdenv.hostPlatform then
      pkgs.runCommandLocal "bento_client.pyc" { } ''
        ${cfg.python}/bin/python3 -I -S -c '
        import py_compile, sys
        py_compile.compile(sys.argv[1], cfile="client.pyc", doraise=True)
        ' ${source}
        mv client.pyc "$out"
      ''
    else
      source;

  # Of the same name for the unit, for a person at a root shell, and for the proof of a new system, which runs the
  # *new* system's command. The path is the same for all of them too. Python starts without what else is installed for
  # it (-I -S): it takes a good part of a poll, and nothing of it may keep a machine from its next update. And no locale
  # may (-X utf8).
  command = pkgs.writeShellScriptBin "bento-client" ''
    export PATH=${
      lib.makeBinPath (
        [
          config.nix.package
          config.systemd.package
          config.programs.ssh.package
          pkgs.coreutils
          pkgs.bash
        ]
        ++ (
          if cfg.build == "server" then
            [ ]
          else
            [
              config.system.build.nixos-rebuild
              pkgs.gitMinimal
              # What Nix unpacks channels and archives with.
              pkgs.gnutar
              pkgs.gzip
              pkgs.xz
            ]
        )
      )
    }''${PATH:+:$PATH}
    exec ${cfg.python}/bin/python3 -I -S -X utf8 ${client} --config /etc/bento/client.json "$@"
  '';

  # In the store: what the running system trusts changes with that system only.
  signersFile = "${pkgs.writeText "bento-signers" (lib.concatMapStrings (key: "${key}\n") cfg.signers)}";

  # Whatever name, address, port or alias the server is reached by, it has to show one of these keys.
  serverKeysFile = "${pkgs.writeText "bento-known-hosts" (
    lib.concatMapStrings (key: "* ${key}\n") cfg.serverKeys
  )}";

  # The boot loader and where it keeps its entries, for the client. It knows how to try a system once with these two.
  systemdBoot = config.boot.loader.systemd-boot;
  inherit (config.boot.loader) grub;
  bootLoader =
    if config.boot.lanzaboote.enable or false then
      [
        "lanzaboote"
        config.boot.loader.efi.efiSysMountPoint
      ]
    else if systemdBoot.enable then
      let
        xbootldr = systemdBoot.xbootldrMountPoint or null;
      in
      [
        "systemd-boot"
        (if xbootldr != null then xbootldr else config.boot.loader.efi.efiSysMountPoint)
      ]
    else if grub.enable then
      [ "grub" ] ++ map (mirror: "${mirror.path}/grub") grub.mirroredBoots
    else
      [ ];

  # Of these its name is all that the client can make use of.
  otherLoader = builtins.filter (name: config.boot.loader.${name}.enable or false) [
    "limine"
    "refind"
    "generic-extlinux-compatible"
    "generationsDir"
    "initScript"
    "external"
  ];

  # In grub.cfg before the entries, when `default` is set and `grub-reboot` has had its turn. The client names entries
  # in grubenv: bento_good, the system that is known to boot, and bento_try, which is to be started once. Only if GRUB
  # could write down that it was, it is. The first line is how the client knows these lines: it goes up with them.
  grubTrial = ''
    # bento: the first boot is a trial (1)
    # bento: the first boot is a trial (2)
    if [ -n "''${bento_good}" -a -z "''${boot_once}" ]; then
      set default="''${bento_good}"
      if [ -n "''${bento_try}" ]; then
        set bento_new="''${bento_try}"
        set bento_try=
        if save_env bento_try; then
          set default="''${bento_new}"
          set bento_trial="bento.trial=''${bento_deadline}"
          export bento_trial
        fi
      fi
    fi
  '';

  # Ends the trial of a system that does not come up, whatever hangs. It is started in the initrd and lives until the
  # client says `proven`: what is in its way later (systemd, its jobs and timers, the client) may stand still. Where a
  # boot is no trial it does nothing: a proven system may check its disks for hours.
  #
  # The @ in front of its name keeps it when the root is switched. Its files are gone then, so: only what bash does by
  # itself, and paths from /dev, which goes along. It counts what it has slept, not the time: a laptop that was asleep is
  # not over its deadline. It feeds the hardware watchdog, until systemd does, so that a kernel that hangs reboots as
  # well. The words that it takes are beats of ten seconds that are left, `sleep` (the machine is about to: a watchdog
  # that nobody feeds would reset it), and `proven`.
  trialEnds = ''
    LC_ALL=C
    set -f
    read -r line </proc/cmdline
    name=none
    seconds=
    asks=
    over=../sys/firmware/efi/efivars/BentoTrialOver-6e3a4a5c-0d0b-4f4e-9d5e-6b656e746f21
    variable=/sys/firmware/efi/efivars/BentoTrial-6e3a4a5c-0d0b-4f4e-9d5e-6b656e746f21
    if [ -e "$variable" ]; then
      { name=$(<"$variable"); } 2>/dev/null
      set -- ''${name:1}
      name=''${1:-none}
      seconds=$2
      asks=$3
    fi
    case " $line " in
      *" bento.trial="*)
        seconds=''${line##*bento.trial=}
        seconds=''${seconds%% *}
        case $seconds in *,asks) asks=1 ;; esac
        seconds=''${seconds%,asks}
        ;;
      *" init=$name/init "*) ;;
      *) exit 0 ;;
    esac
    case $seconds in "" | *[!0-9]*) seconds=900 ;; esac
    umask 077
    mkfifo /run/bento-trial || exit 0
    exec 3<>/run/bento-trial 4>/proc/sysrq-trigger 6>/dev/kmsg
    echo -1000 >/proc/self/oom_score_adj
    cd /dev
    set +f
    dog=
    asleep=0
    beats=$(((seconds + 9) / 10))
    echo "<5>bento: a trial, for $seconds seconds" >&6
    while [ "$beats" -gt 0 ]; do
      if [ -z "$dog" ] && [ "$asleep" = 0 ] && [ -c watchdog0 ] && { exec 5>watchdog0; } 2>null; then dog=1; fi
      if [ -n "$dog" ]; then echo >&5; fi
      if read -t 10 -r word <&3; then
        case $word in
          proven)
            if [ -n "$dog" ]; then echo -n V >&5; fi
            exit 0
            ;;
          sleep)
            if [ -n "$dog" ]; then
              echo -n V >&5
              exec 5>&-
            fi
            dog=
            asleep=6
            ;;
          [1-9]*) beats=$word ;;
        esac
        continue
      fi
      if [ "$asleep" -gt 0 ]; then asleep=$((asleep - 1)); fi
      # Somebody may be asked for a passphrase, and asleep, where that is as it always was.
      asked=
      for each in ../run/systemd/ask-password/ask.* ../crypt-ramfs/device; do
        if [ -e "$each" ]; then asked=$asks; fi
      done
      if [ -z "$asked" ]; then beats=$((beats - 1)); fi
    done
    echo "<2>bento: the trial is over" >&6
    # For the report, where the firmware does not hang in it.
    { printf '\7\0\0\0over' >$over; } 2>null &
    read -t 5 -r word <&3
    echo b >&4
  '';

  trialFile = pkgs.writeText "bento-trial" trialEnds;

  # Whether there are trials, and nobody in front of the machine to end one.
  ends = cfg.unattended && bootLoader != [ ];
  inherit (config.boot) initrd;

  # The same in both stages: when the second begins, systemd stops what only the first has.
  trialService = bash: {
    description = "End the trial of a system that does not come up";
    unitConfig = {
      DefaultDependencies = false;
      IgnoreOnIsolate = true;
      SurviveFinalKillSignal = true;
      FailureAction = "reboot-force";
    };
    serviceConfig.ExecStart = "@${bash} @bento-trial ${trialFile}";
  };

  # Whether a boot asks for a passphrase, so that it may wait for somebody: not one that a chip or a file has.
  asks = builtins.any (
    device: (device.keyFile or null) == null && (device.crypttabExtraOpts or [ ]) == [ ]
  ) (builtins.attrValues (initrd.luks.devices or { }));

  # The hardware watchdog's option, new and old.
  watchdog =
    if options.systemd ? settings then
      {
        option = "settings";
        value.Manager.RuntimeWatchdogSec = lib.mkDefault "30s";
      }
    else
      {
        option = "watchdog";
        value.runtimeTime = lib.mkDefault "30s";
      };

  settings = {
    inherit (cfg)
      activation
      server
      port
      host
      user
      identity
      reboot
      build
      ;
    state_dir = cfg.stateDir;
    ssh_options = cfg.sshOptions;
    connect_timeout = cfg.connectTimeout;
    build_timeout = cfg.buildTimeout;
    activation_timeout = cfg.activationTimeout;
    confirm_timeout = cfg.confirmTimeout;
    health_checks = cfg.healthChecks;
    upgrade_channels = cfg.upgradeChannels;
    allow_options = cfg.allowOptions;
    rebuild_every = cfg.rebuildEvery;
    after_deployment = cfg.afterDeployment;
    boot_loader = if bootLoader != [ ] then bootLoader else otherLoader;
    reboot_without_trial = cfg.rebootWithoutTrial;
    inherit asks;
    esp = if systemdBoot.enable || (config.boot.lanzaboote.enable or false) then config.boot.loader.efi.efiSysMountPoint else "";
  }
  // lib.optionalAttrs (cfg.knownHosts != null) { known_hosts = cfg.knownHosts; }
  // lib.optionalAttrs (pollSeconds != null) { interval = pollSeconds; }
  // lib.optionalAttrs (cfg.offlineAfter != null) { offline_after = cfg.offlineAfter * 3600; }
  // lib.optionalAttrs (cfg.signers != [ ]) { signers = signersFile; }
  // lib.optionalAttrs (cfg.cacheKey != null) { cache_key = cfg.cacheKey; };

  # How often it polls, as far as that can be told here: the server worries after three polls that were missed.
  minutes = builtins.match "\\*:0*0/([1-9][0-9]?)" cfg.interval;
  pollSeconds =
    if minutes != null then
      60 * builtins.fromJSON (builtins.head minutes)
    else
      {
        hourly = 3600;
        daily = 86400;
        weekly = 7 * 86400;
      }
      .${cfg.interval} or null;

  servers = lib.toList cfg.server;
  isServer = name: builtins.match "[A-Za-z0-9:[][]A-Za-z0-9._:%[-]*" name != null && !isHostAndPort name;
  isHostAndPort = name: builtins.match "[^:]*:[^:]*" name != null;
  isPublicKey = key: builtins.match "(ssh|ecdsa|sk)-[^ ]+ +AAAA[A-Za-z0-9+/=]+( .*)?" key != null;

  seconds =
    default: description:
    mkOption {
      type = types.ints.positive;
      inherit default description;
    };
in
{
  options.services.bento = {
    enable = mkOption {
      type = types.bool;
      default = true;
      description = ''
        Whether this machine follows the releases that its Bento server publishes for it.

        On by default, where other modules are off: a machine whose next configuration has lost Bento can no longer be
        reached by it, so that importing the module has to be enough.
      '';
    };

    server = mkOption {
      type = types.either types.str (types.listOf types.str);
      example = [
        "bento.example.org"
        "10.0.0.1"
      ];
      description = ''
        The server's name or address, or several of them, which are tried in this order.
      '';
    };

    port = mkOption {
      type = types.port;
      default = 22;
      description = "The port of the server's sshd.";
    };

    host = mkOption {
      type = types.str;
      default = config.networking.hostName;
      defaultText = literalExpression "config.networking.hostName";
      example = "t470";
      description = ''
        The machine's name in the fleet: that of its directory in `hosts/` on the server. With a flake, also that of
        the configuration in `nixosConfigurations`.
      '';
    };

    user = mkOption {
      type = types.strMatching "[A-Za-z_][A-Za-z0-9_.-]*";
      default = "bento-${cfg.host}";
      defaultText = literalExpression ''"bento-''${config.services.bento.host}"'';
      description = "The machine's user on the server.";
    };

    identity = mkOption {
      # Not types.path: a path literal would copy the private key into the store.
      type = types.str;
      default = "${cfg.stateDir}/id_ed25519";
      defaultText = literalExpression ''"''${config.services.bento.stateDir}/id_ed25519"'';
      example = "/etc/ssh/ssh_host_ed25519_key";
      description = ''
        The private SSH key that the machine proves itself with. `bento-client key` prints the public one, and makes
        the pair if there is none.
      '';
    };

    serverKeys = mkOption {
      type = types.listOf types.singleLineStr;
      default = [ ];
      example = [ "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIEJFTlRPIEVYQU1QTEUgS0VZIERPIE5PVCBVU0UhISEh" ];
      description = ''
        The server's public host keys, as in its `/etc/ssh/ssh_host_*_key.pub`. The machine then trusts these, and no
        others. Without any, it keeps the first key it is shown, and trusts that from then on.
      '';
    };

    knownHosts = mkOption {
      type = types.nullOr types.str;
      default = if cfg.serverKeys == [ ] then null else serverKeysFile;
      defaultText = literalExpression "a file with the keys in config.services.bento.serverKeys, if there are any";
      example = "/etc/ssh/ssh_known_hosts";
      description = ''
        A file with the server's host keys, in the format of {manpage}`sshd(8)`, to use instead of
        {option}`services.bento.serverKeys`.
      '';
    };

    signers = mkOption {
      type = types.listOf types.singleLineStr;
      default = [ ];
      example = [ "sk-ssh-ed25519@openssh.com AAAAGnNrLXNzaC1lZDI1NTE5QG9wZW5zc2guY29tAAAA admin@example.org" ];
      description = ''
        Public SSH keys of those who sign this machine's releases with `bento.py sign`. With any, the machine takes
        what one of them has signed, and nothing else, whoever serves it, and whatever system runs: only a release that
        was signed with `--unsign`, or `bento-client unpin` at the machine, ends that. A release whose own signers lack
        the key that signed it is refused.
      '';
    };

    cacheKey = mkOption {
      type = types.nullOr types.singleLineStr;
      default = null;
      example = "bento-aBcD1234:AAAAC3NzaC1lZDI1NTE5AAAAIEJFTlRPIEVYQU1QTEUgS0U=";
      description = ''
        The public key with which `bento.py sign --build` signs for Nix what it has built; it prints it. With
        {option}`services.bento.signers` and `build = "server"`, the machine takes from its substituters what this key
        has signed, and nothing else, whatever {option}`nix.settings.trusted-public-keys` lists: what is signed of a
        release is the name of a store path, and not its content. Several are separated by spaces.
      '';
    };

    sshOptions = mkOption {
      type = types.listOf types.str;
      default = [ ];
      example = literalExpression ''[ "ProxyCommand=''${pkgs.netcat}/bin/nc -X 5 -x 127.0.0.1:9050 %h %p" ]'';
      description = ''
        More options for ssh, as one would give them with `-o`. They go before Bento's own. {manpage}`ssh_config(5)`
        has them all. What a ProxyCommand starts is not on the unit's path: name it by its store path.
      '';
    };

    interval = mkOption {
      type = types.str;
      default = "*:0/15";
      example = "hourly";
      description = ''
        When to poll the server, in the format of {manpage}`systemd.time(7)`. Whatever it says, the machine also polls
        soon after it has booted.
      '';
    };

    randomizedDelay = mkOption {
      type = types.str;
      default = "15min";
      example = "1h";
      description = ''
        The time over which the fleet spreads its polls. Each machine has an offset of its own in it, always the same,
        so that a thousand of them do not knock in the same second. One whole {option}`services.bento.interval` is
        best: change them together.
      '';
    };

    build = mkOption {
      type = types.enum [
        "host"
        "server"
      ];
      default = "host";
      description = ''
        Who builds this machine's systems. `"server"` is for machines too small for it: they evaluate and build nothing,
        and fetch what `bento.py populate --build` has built from their substituters ({option}`nix.settings.substituters`),
        signed by a key in {option}`nix.settings.trusted-public-keys`; with {option}`services.bento.signers`, what
        `bento.py sign --build` has built, signed by {option}`services.bento.cacheKey`.
      '';
    };

    offlineAfter = mkOption {
      type = types.nullOr types.ints.positive;
      default = null;
      example = 168;
      description = ''
        For how many hours this machine may be silent before the server calls it offline and asks for a person: for a
        laptop, say a week. By default two hours, or three of its polls if {option}`services.bento.interval` is
        `hourly`, `daily`, `weekly` or `*:0/MINUTES`.
      '';
    };

    connectTimeout = seconds 20 "How long to wait for the server to answer, in seconds.";
    buildTimeout = seconds 43200 "How long a build may take, in seconds.";
    activationTimeout = seconds 600 "How long an activation may take, in seconds.";

    confirmTimeout = seconds 120 ''
      How long the new system has to reach the server and pass its health checks, in seconds. If it does not, the
      machine goes back to the system before.
    '';

    healthChecks = mkOption {
      type = types.listOf types.str;
      default = [ ];
      example = literalExpression ''
        [
          "systemctl is-active nginx.service"
          "''${pkgs.curl}/bin/curl --fail --silent --max-time 10 http://localhost/"
        ]
      '';
      description = ''
        Shell commands, each of which has to succeed for a new system to be kept. They run as root, with coreutils,
        systemd, OpenSSH and Nix on their path, and the limits of `bento.service`: they cannot mount, for example.
      '';
    };

    upgradeChannels = mkOption {
      type = types.bool;
      default = false;
      description = ''
        Whether to update root's channels before a build, as `nixos-rebuild --upgrade` does. For machines without a
        flake.
      '';
    };

    allowOptions = mkOption {
      type = types.listOf types.str;
      default = [ ];
      example = [ "--accept-flake-config" ];
      description = ''
        Words that the `options` of a release's `bento.json` may have, beside the harmless ones (`-L`, `--show-trace`,
        `--max-jobs N`, …). Such an option may run a program as root, before the release has proven anything, so it has to be
        allowed by the system that runs already.
      '';
    };

    rebuildEvery = mkOption {
      type = types.nullOr types.ints.positive;
      default = null;
      example = 604800;
      description = ''
        After how many seconds a release that is fine is built again, with root's channels updated before it, and
        deployed if that gives another system: with the same proof as a new release, and the same way back. For machines
        without a flake, which would else get no security updates between two releases. `null` is never.
      '';
    };

    activation = mkOption {
      type = types.enum [
        "live"
        "boot"
      ];
      default = "live";
      description = ''
        `"live"` activates a new system at once. `"boot"` makes it what the next boot starts, and proves it then: nothing
        changes under the person at the machine. {option}`services.bento.reboot` says whether Bento may reboot for it.
      '';
    };

    afterDeployment = mkOption {
      type = types.listOf types.str;
      default = [ ];
      example = literalExpression ''
        [ "''${pkgs.util-linux}/bin/wall \"update: $BENTO_RESULT $BENTO_REASON\"" ]
      '';
      description = ''
        Shell commands to be told how an attempt at a release ended: `BENTO_RESULT` is `ok`, `fetch-failed`,
        `build-failed`, `postponed`, `interrupted`, `rolled-back` or `rollback-failed`, `BENTO_REASON` why,
        `BENTO_RELEASE` and `BENTO_REVISION` which. They run as the health checks do, when all is over and reported: for
        at most a minute each, and whatever they do changes nothing. What they print is in the journal of
        `bento.service`.
      '';
    };

    reboot = mkOption {
      type = types.either (types.enum [
        "never"
        "when-needed"
      ]) (types.strMatching "([01][0-9]|2[0-3]):[0-5][0-9]-([01][0-9]|2[0-3]):[0-5][0-9]");
      default = "never";
      example = "03:00-05:00";
      description = ''
        Whether to reboot into a release that needs it: one with another kernel, initrd or kernel modules, or one that
        NixOS cannot activate live. `"never"` leaves that to you, and says so in the report; `"when-needed"` reboots at
        any time; `"HH:MM-HH:MM"` between these times of the day, in the machine's time zone.
      '';
    };

    rebootWithoutTrial = mkOption {
      type = types.bool;
      default = false;
      description = ''
        Whether {option}`services.bento.reboot` holds where no trial is possible, too: where the boot loader cannot be
        told to start a system just once (`boot trial` in `bento-client status`). A release that does not boot then
        takes a person at the machine.
      '';
    };

    stateDir = mkOption {
      type = types.str;
      default = "/var/lib/bento";
      description = "Where the client keeps its files: a directory in `/var/lib`.";
    };

    python = mkOption {
      type = types.package;
      default =
        if
          lib.versionAtLeast config.system.nixos.release "25.11"
          || (config.system.rebuild.enableNg or false)
          || config.boot.loader.systemd-boot.enable
        then
          pkgs.python3
        else
          pkgs.python3Minimal;
      defaultText = literalExpression "pkgs.python3 where NixOS needs it anyway, else pkgs.python3Minimal";
      example = literalExpression "pkgs.python3Minimal";
      description = ''
        The Python that runs the client, 3.11 or later. It needs the standard library only, and of that only what
        `python3Minimal` has.

        The default is what costs nothing or the least: `nixos-rebuild` from NixOS 25.11 on and the installer of
        systemd-boot are written in Python, so that `python3` is there already. A machine with neither gets the small
        one.
      '';
    };

    unattended = mkOption {
      type = types.bool;
      default = true;
      description = ''
        Whether this machine is to help itself when a boot fails, because nobody sits in front of it: it boots again
        30 seconds after a kernel panic (`panic=30`) and when the first stage fails (`boot.panic_on_fail`), goes on
        without what is missing instead of waiting in emergency mode for root's password
        ({option}`systemd.enableEmergencyMode`), and has systemd feed the hardware watchdog, if there is one. Together
        with the boot loader, that brings a machine back from a release that does not boot.

        Each of these is a default: what you set yourself goes before it.
      '';
    };

    trigger = {
      enable = mkOption {
        type = types.bool;
        default = false;
        description = ''
          Whether everybody on this machine may ask for an update: who connects to
          {option}`services.bento.trigger.port` on 127.0.0.1 starts `bento.service`, and is shown its log until it has
          ended. Nothing that they send is read. With bash, for example:

          ```
          cat < /dev/tcp/127.0.0.1/51337
          ```
        '';
      };

      port = mkOption {
        type = types.port;
        default = 51337;
        description = "The port on 127.0.0.1.";
      };
    };
  };

  imports = [
    # The module is there, and Bento is not wanted: the client takes that as its leave, not as a mistake.
    { environment.etc = lib.mkIf (!cfg.enable) { "bento/left".text = ""; }; }
  ];

  config = lib.mkIf cfg.enable {
    assertions = [
      {
        assertion = servers != [ ] && builtins.all isServer servers;
        message = ''
          services.bento.server cannot be ${builtins.toJSON cfg.server}: give the server's name or address, or a list
          of them. The port goes to services.bento.port, the user to services.bento.user.
        '';
      }
      {
        assertion = builtins.match "[A-Za-z0-9][A-Za-z0-9_-]{0,24}" cfg.host != null;
        message = ''
          services.bento.host cannot be "${cfg.host}": set it, or networking.hostName, to the name of this machine's
          directory in hosts/ on the server. It has 1 to 25 of A-Z a-z 0-9 _ - and begins with a letter or digit.
        '';
      }
      {
        assertion = !lib.hasPrefix builtins.storeDir cfg.identity && lib.hasPrefix "/" cfg.identity;
        message = ''
          services.bento.identity cannot be "${cfg.identity}": everybody can read the Nix store. Leave it unset, and
          let `bento-client key` make a key; or give the absolute path of one that is not in the store, as a string.
        '';
      }
      {
        assertion = builtins.all isPublicKey cfg.serverKeys;
        message = ''
          services.bento.serverKeys: a key is "ssh-ed25519 AAAA…", as in /etc/ssh/ssh_host_ed25519_key.pub on the
          server. Remove the host name that ssh-keyscan and known_hosts files put before it.
        '';
      }
      {
        assertion = builtins.all isPublicKey cfg.signers;
        message = "services.bento.signers: a key is \"ssh-ed25519 AAAA…\", as in the .pub file that ssh-keygen makes.";
      }
      {
        assertion = cfg.build == "server" && cfg.signers != [ ] -> cfg.cacheKey != null;
        message = ''
          services.bento.cacheKey: with `build = "server"` and signers, set it to the key that `bento.py sign --build`
          prints. The key of the server's own cache says nothing of who signed: it lies on the server.
        '';
      }
      {
        assertion =
          builtins.length servers < 2
          || !builtins.all isServer servers
          || cfg.knownHosts != null
          || cfg.signers != [ ];
        message = ''
          services.bento.server is a list: set services.bento.serverKeys, or services.bento.signers. Without them each
          server is trusted at its first contact, and that of the second may be in a year, with anybody.
        '';
      }
      {
        assertion = cfg.serverKeys == [ ] || cfg.knownHosts == serverKeysFile;
        message = "services.bento.serverKeys and services.bento.knownHosts exclude each other: remove one of them.";
      }
      {
        assertion = builtins.match "/var/lib/[^/]+(/[^/]+)*" cfg.stateDir != null;
        message = ''
          services.bento.stateDir cannot be "${cfg.stateDir}": systemd makes and protects it, which it does in /var/lib
          only. To have it elsewhere, mount or link it there.
        '';
      }
      {
        assertion = config.nix.enable;
        message = "services.bento builds on the machine itself, which takes Nix: remove `nix.enable = false`.";
      }
      {
        assertion = cfg.upgradeChannels -> cfg.build == "host";
        message = ''
          services.bento.upgradeChannels is for machines that build: remove it, and update the channels of the server.
        '';
      }
      {
        assertion = config.system.switch.enable or true;
        message = "services.bento activates what it has built: remove `system.switch.enable = false`.";
      }
      {
        assertion = !config.system.autoUpgrade.enable;
        message = ''
          services.bento and system.autoUpgrade would undo each other's work: remove `system.autoUpgrade.enable = true`.
        '';
      }
      {
        assertion = (cfg.upgradeChannels || cfg.rebuildEvery != null) -> config.nix.channel.enable;
        message = ''
          services.bento.upgradeChannels and rebuildEvery need channels: remove `nix.channel.enable = false`; or, with a
          flake, remove these two and update its lock file on the server.
        '';
      }
    ];

    environment.systemPackages = [ command ];

    # With users, GRUB asks for a password where an entry is chosen by its name: at each boot, with these lines.
    boot.loader.grub.extraConfig = lib.mkIf (grub.enable && (grub.users or { }) == { }) grubTrial;

    # First in the list: the kernel takes the last of several, which is then the user's.
    # The last one is how a boot learns that it is a trial: GRUB puts in its word, or nothing.
    boot.kernelParams = lib.mkIf cfg.unattended (
      lib.mkBefore (
        [
          "panic=30"
          "boot.panic_on_fail"
        ]
        ++ lib.optional (!systemdBoot.enable && grub.enable) "\${bento_trial}"
      )
    );

    # The watchdogs of most PCs and virtual machines.
    boot.initrd.availableKernelModules = lib.mkIf (ends && pkgs.stdenv.hostPlatform.isx86_64 or false) [
      "efivarfs"
      "i2c_i801"
      "i6300esb"
      "iTCO_wdt"
      "lpc_ich"
      "sp5100_tco"
      "wdat_wdt"
    ];

    boot.initrd.systemd.storePaths = lib.mkIf (ends && initrd.systemd.enable) [ "${trialFile}" ];

    boot.initrd.systemd.services.bento-trial-ends = lib.mkIf (ends && initrd.systemd.enable) (
      trialService "/bin/bash" // { wantedBy = [ "sysinit.target" ]; }
    );

    # The other kind of initrd. The process has to have its name before stage 1 ends all that have no @.
    boot.initrd.extraUtilsCommands = lib.mkIf (
      ends && !initrd.systemd.enable
    ) "copy_bin_and_libs ${pkgs.bash}/bin/bash";

    boot.initrd.preDeviceCommands = lib.mkIf (ends && !initrd.systemd.enable) (
      lib.mkBefore ''
        if [ -d /sys/firmware/efi ]; then
          modprobe efivarfs 2>/dev/null
          mount -t efivarfs efivarfs /sys/firmware/efi/efivars 2>/dev/null
        fi
        cat >/bento-trial <<'BENTO'
        ${trialEnds}
        BENTO
        bash -c 'exec -a @bento-trial bash /bento-trial' &
        trial=$!
        while [ ! -p /run/bento-trial ] && kill -0 $trial 2>/dev/null; do sleep 0.1; done
      ''
    );

    # Nobody starts it in the second stage: it is there, or this is no trial.
    systemd.services.bento-trial-ends = lib.mkIf ends (
      trialService "${pkgs.bash}/bin/bash"
      // {
        restartIfChanged = false;
        stopIfChanged = false;
        unitConfig = (trialService "").unitConfig // {
          X-StopOnRemoval = false;
        };
      }
    );

    # Started by the client in a trial that has not been proven yet, whatever the interval of the polls is.
    systemd.timers.bento-proof = {
      description = "Try the proof of a new system again";
      timerConfig = {
        OnActiveSec = "5min";
        OnUnitInactiveSec = "5min";
        Unit = "bento.service";
      };
    };

    systemd.enableEmergencyMode = lib.mkIf cfg.unattended (lib.mkDefault false);

    systemd.${watchdog.option} = lib.mkIf cfg.unattended watchdog.value;

    environment.etc."bento/client.json".text = builtins.toJSON settings;

    systemd.services.bento = {
      description = "Follow the releases of the Bento server";
      after = [ "network-online.target" ];
      wants = [ "network-online.target" ];

      # The switch to a new system runs in a unit of its own, but it is this one that waits for it and proves the
      # system: the switch must neither stop nor restart it. And no target may want it: the switch would start it.
      restartIfChanged = false;
      unitConfig.X-StopOnRemoval = false;

      # Someone who asks for update after update should not keep the timer from starting the next.
      unitConfig.StartLimitIntervalSec = 0;

      environment =
        config.nix.envVars
        // {
          inherit (config.environment.sessionVariables) NIX_PATH;
          # Where Nix looks for channels and keeps its cache, and git for access to private inputs.
          HOME = "/root";
          # Root's Nix would build in this unit. The daemon builds with its own limits and priority, so that this
          # unit can do without namespaces and mounts.
          NIX_REMOTE = "daemon";
        }
        // config.networking.proxy.envVars;

      serviceConfig = {
        # Its start is done at once. A oneshot unit would be part of the boot: the system stays "starting" while one runs,
        # and a switch of 2024 waits for the end of that.
        Type = "exec";
        ExecStart = "${command}/bin/bento-client run";
        StateDirectory = lib.removePrefix "/var/lib/" cfg.stateDir;
        StateDirectoryMode = "0700";
        UMask = "0022";

        # The client limits each step by itself, and ends what it started.
        # When memory runs out in an evaluation, that is what has to end: the client is needed, to report it.
        OOMPolicy = "continue";

        # No sandbox contains a unit that may ask systemd for anything. These keep ssh, Nix' evaluator and the health
        # checks to what they need, which is worth having against bugs.
        #
        # All that need a mount namespace are left out (ProtectSystem, ProtectHome, PrivateTmp, ProtectKernel* and the
        # like). The proof has to see the machine as it is: with system.etc.overlay, for one, a switch mounts another
        # /etc, and what is mounted over /etc in here would still show the old one. Of what goes with them, the
        # capabilities and system calls, the lists below take the same.
        #
        # Devices, networking and raw access to disks stay, for health checks (`zpool status`, `wg show`, `smartctl`).
        # CAP_SYS_ADMIN and CAP_SYS_BOOT stay: systemd looks for them in whoever asks it to start units or to reboot.
        # CAP_LINUX_IMMUTABLE stays for bootctl: the kernel marks EFI variables so.
        NoNewPrivileges = true;
        CapabilityBoundingSet = "~${
          toString [
            "CAP_AUDIT_CONTROL"
            "CAP_BLOCK_SUSPEND"
            "CAP_BPF"
            "CAP_IPC_LOCK"
            "CAP_LEASE"
            "CAP_MAC_ADMIN"
            "CAP_MAC_OVERRIDE"
            "CAP_MKNOD"
            "CAP_PERFMON"
            "CAP_SYSLOG"
            "CAP_SYS_CHROOT"
            "CAP_SYS_MODULE"
            "CAP_SYS_PACCT"
            "CAP_SYS_PTRACE"
            "CAP_SYS_TIME"
            "CAP_SYS_TTY_CONFIG"
            "CAP_WAKE_ALARM"
          ]
        }";
        KeyringMode = "private";
        LockPersonality = true;
        ProtectHostname = true;
        RestrictAddressFamilies = [
          "AF_UNIX"
          "AF_INET"
          "AF_INET6"
          "AF_NETLINK"
        ];
        RestrictNamespaces = true;
        RestrictRealtime = true;
        RestrictSUIDSGID = true;
        SystemCallArchitectures = "native";
        SystemCallErrorNumber = "EPERM";
        SystemCallFilter = "~${
          toString [
            "@clock"
            "@cpu-emulation"
            "@debug"
            "@module"
            "@mount"
            "@obsolete"
            "@raw-io"
            "@reboot"
            "@swap"
          ]
        }";
      };
    };

    systemd.timers.bento = {
      description = "Poll the Bento server";
      wantedBy = [ "timers.target" ];
      timerConfig = {
        OnCalendar = cfg.interval;
        RandomizedDelaySec = cfg.randomizedDelay;
        FixedRandomDelay = true;
        Persistent = true;
      };
    };

    # A machine that was off is behind, and one that rebooted into a new system still has to prove it: soon, and
    # without the random delay.
    systemd.timers.bento-boot = {
      description = "Poll the Bento server soon after the boot";
      wantedBy = [ "timers.target" ];
      timerConfig = {
        OnBootSec = "45s";
        AccuracySec = "1s";
        Unit = "bento.service";
      };
    };

    # Variables of a boot loader outlive everything: whoever makes another system the default, or leaves Bento, by hand,
    # is not to find ours in them. It stops with a shutdown, and when a system without it is switched to.
    systemd.services.bento-trial = lib.mkIf (bootLoader != [ ]) {
      description = "Let go of the boot loader when the default is another's";
      wantedBy = [ "multi-user.target" ];
      restartIfChanged = false;
      serviceConfig = {
        Type = "oneshot";
        RemainAfterExit = true;
        ExecStart = "${pkgs.coreutils}/bin/true";
        ExecStop = "${command}/bin/bento-client align";
        TimeoutStopSec = "30s";
      };
    };

    # Only where somebody has switched emergency mode on.
    systemd.services.bento-emergency = lib.mkIf (bootLoader != [ ]) {
      description = "Leave the trial of a new system that ends in emergency mode";
      wantedBy = [ "emergency.target" ];
      unitConfig.DefaultDependencies = false;
      serviceConfig.Type = "oneshot";
      serviceConfig.ExecStart = "${command}/bin/bento-client emergency";
    };

    systemd.services.bento-hibernate = lib.mkIf (bootLoader != [ ]) {
      description = "Have the kernel that goes to sleep woken, trial or not";
      requiredBy = [
        "systemd-hibernate.service"
        "systemd-hybrid-sleep.service"
        "systemd-suspend-then-hibernate.service"
      ];
      before = [
        "systemd-hibernate.service"
        "systemd-hybrid-sleep.service"
        "systemd-suspend-then-hibernate.service"
      ];
      unitConfig.StopWhenUnneeded = true;
      serviceConfig = {
        Type = "oneshot";
        RemainAfterExit = true;
        ExecStart = "${command}/bin/bento-client hibernate";
        # Awake again.
        ExecStop = "${command}/bin/bento-client align";
      };
    };

    systemd.sockets.bento-trigger = lib.mkIf cfg.trigger.enable {
      description = "Requests for an update from this machine's users";
      wantedBy = [ "sockets.target" ];
      socketConfig = {
        ListenStream = "127.0.0.1:${toString cfg.trigger.port}";
        Accept = true;
        # One at a time. The next are turned away, however many.
        MaxConnections = 1;
        TriggerLimitIntervalSec = 0;
        IPAddressAllow = "localhost";
        IPAddressDeny = "any";
      };
    };

    systemd.services."bento-trigger@" = lib.mkIf cfg.trigger.enable {
      description = "Start an update and show its log";

      # It shows the log of a switch, to the end.
      restartIfChanged = false;
      unitConfig.X-StopOnRemoval = false;
      unitConfig.CollectMode = "inactive-or-failed";

      # `since`, because journalctl may be slower to start than the update.
      script = ''
        since=$(date +%s)
        journalctl --follow --output=cat --since="@$since" --unit=bento.service &
        if systemctl start --wait bento.service; then
          outcome="bento: done"
        else
          outcome="bento: failed; bento-client status tells root why"
        fi
        # For the last lines to arrive.
        sleep 1
        kill $! 2>/dev/null || true
        echo "$outcome" || true
      '';

      serviceConfig = {
        # Output only: what the other side sends is never read.
        StandardInput = "null";
        StandardOutput = "socket";
        StandardError = "journal";
        TimeoutStartSec = "infinity";

        # root, because systemd starts units for nobody else; for that it looks for CAP_SYS_ADMIN.
        NoNewPrivileges = true;
        CapabilityBoundingSet = [ "CAP_SYS_ADMIN" ];
        IPAddressAllow = "localhost";
        IPAddressDeny = "any";
        KeyringMode = "private";
        LockPersonality = true;
        MemoryDenyWriteExecute = true;
        PrivateDevices = true;
        PrivateTmp = true;
        ProtectClock = true;
        ProtectControlGroups = true;
        ProtectHome = true;
        ProtectHostname = true;
        ProtectKernelLogs = true;
        ProtectKernelModules = true;
        ProtectKernelTunables = true;
        ProtectSystem = "strict";
        RestrictAddressFamilies = [ "AF_UNIX" ];
        RestrictNamespaces = true;
        RestrictRealtime = true;
        RestrictSUIDSGID = true;
        SystemCallArchitectures = "native";
        SystemCallErrorNumber = "EPERM";
        SystemCallFilter = [
          "@system-service"
          "~@privileged @resources"
        ];
      };
    };
  };
}
