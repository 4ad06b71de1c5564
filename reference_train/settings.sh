# The settings of the loss that photos.sh and icons.sh compare. R is the reference batch size.
#   clip             CLIP's loss
#   recommended      R = 32, times the progress of CLIP's loss
#   warmup           R = 128, as strong as in the paper, after a warm-up of 512 steps
#   constant         R = 128, at full strength from the first step
#   c-cyclip-warmup, i-cyclip-warmup    as warmup, with the cross-modal or the in-modal penalty alone
#   i-cyclip-recommended                as recommended, with the in-modal penalty alone
# NAME-centered: with penalties on centred features. NAME-ids: without pairs of the same caption as
# negatives. Each value is given, so that they stay those of the records.
loss_flags() { # SETTING
    paper="--penalties paper --reference-batch-size 128"
    case $1 in
    clip*) echo "--loss clip" ;;
    recommended*) echo "--loss cyclip --penalties paper --reference-batch-size 32 --lambda-progress" ;;
    warmup*) echo "--loss cyclip $paper --lambda-warmup 512" ;;
    constant*) echo "--loss cyclip $paper" ;;
    i-cyclip-recommended*)
        echo "--loss i-cyclip --penalties paper --reference-batch-size 32 --lambda-progress" ;;
    [ci]-cyclip-warmup*) echo "--loss ${1%%-warmup*} $paper --lambda-warmup 512" ;;
    esac
    case $1 in
    *-centered) echo "--centered" ;;
    esac
    case $1 in
    *-ids) echo "--same-captions ignored" ;;
    esac
}
